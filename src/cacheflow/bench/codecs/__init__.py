"""What codecs make of a model's keys and values, and of the tokens after them."""
