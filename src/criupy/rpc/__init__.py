"""Drive CRIU through its RPC: every request, blocking or on trio."""
