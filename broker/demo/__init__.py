"""Everything on one machine, for trying it out."""
