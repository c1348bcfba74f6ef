"""Random programs of attention: whole functions and modules, as source text, compiled and compared with PyTorch.

    python -m tests.programs --count 10000 --seeds 1 2 3 4 --jobs 2     draws, runs, shrinks, prints a table
    python -m tests.programs --run program.py                           runs one program that was printed
    python -m tests.programs --show 1/17                                prints a program by its name
    python -m tests.programs --sweep "" --within "attention 0/masked=1" runs every option alone, a mask being there

`choices` draws by name, `masks` and `grammar` write programs, `run` judges them, `shrink` makes a failing one small,
`many` runs many. A new spelling is one line in a table of `masks` or `grammar`.
"""
