"""Studies: what one command measures, and what it has to tell; `study.Study` is the shape of all of them."""
