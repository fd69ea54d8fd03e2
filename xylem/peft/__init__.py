"""Trees to trees: methods that change what of a pre-trained network is learned, and with which weights."""
