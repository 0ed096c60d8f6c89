"""What a database folder holds: runs, scale tables' models, evaluations; what `doctor` says of its files."""
