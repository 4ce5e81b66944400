"""How results are shown: words, drawings, pages and the terminal. Nothing here knows a model."""
