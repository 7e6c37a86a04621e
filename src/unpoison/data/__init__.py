"""Where images enter and leave: named by a source, decoded once, written back as a cleaned copy."""
