"""One page about a study: tables, figures, verdicts, drawn from the results alone."""
