"""What attention looks like: recognition knowledge only, as small rules. Nothing here knows kernels or edits graphs."""
