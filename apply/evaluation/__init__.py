"""Models scored document by document, and compared with paired statistics."""
