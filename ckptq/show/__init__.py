"""How results look: tables, lines and JSON in a terminal, and pages with charts."""
