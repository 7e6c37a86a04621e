"""How good was that? The only question whose answer may know the truth: labels and attack plans."""
