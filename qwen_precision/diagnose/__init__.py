"""All of qprec probe: measure, tell causes apart, search for triggers, rescue."""
