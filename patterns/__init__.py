"""What attention looks like: recognition knowledge only, as small rules. Nothing here edits a graph or knows a kernel."""
