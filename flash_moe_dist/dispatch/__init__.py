"""How one pass of a sharded layer travels between ranks."""
