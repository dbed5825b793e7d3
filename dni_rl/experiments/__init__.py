"""The experiments of the papers, each a small program: `python -m dni_rl.experiments.<name> --help`."""
