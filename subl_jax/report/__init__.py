"""What a person reads: the table in the terminal, the self-contained HTML reports, and their figures as files."""
