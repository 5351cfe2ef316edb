"""What a person reads: the table in the terminal and the self-contained HTML report."""
