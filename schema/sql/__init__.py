"""SQL over a database: its views and named queries, the sandbox that runs them, and how an answer prints."""
