"""Two results compared document by document: lm-eval's logs, or stored evaluations. No torch."""
