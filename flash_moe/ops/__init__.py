"""The expert op and the primitives that it is made of."""
