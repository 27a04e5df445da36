"""The steps of tools/gpu_check.py, a file for each; commands.py has what they share."""
