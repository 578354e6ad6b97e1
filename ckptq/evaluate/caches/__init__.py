"""How keys and values are held between tokens, and attention over them."""
