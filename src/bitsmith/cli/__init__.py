"""The command line: one file a command, thin over `recipe` and `report`. The only room that prints."""
