"""The `dpfl` command."""
