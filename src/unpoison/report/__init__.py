"""Results to text: one Report record, and pure functions that turn it into a page or into terminal lines."""
