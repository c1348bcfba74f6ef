"""`python -m attn_rewriter bench …`: kernels and forms of attention, measured on this machine."""
