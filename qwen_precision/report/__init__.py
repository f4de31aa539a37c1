"""What qprec report does between its arguments and its text. No torch."""
