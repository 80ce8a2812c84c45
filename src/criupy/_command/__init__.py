"""What the commands of both daemons share: CRIU's command line, CRIU's log, and being a good daemon."""
