"""What commands share with the terminal: options and errors, tables as text, completion, the SQL shell."""
