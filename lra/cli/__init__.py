"""What the commands of `subquad` do, which are also the files in scripts/: see `__main__.COMMANDS`."""
