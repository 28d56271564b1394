"""What a model costs on this machine: speed and memory, measured; and the table of it that budgets take."""
