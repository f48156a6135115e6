"""tutelage: alignment from demonstrations alone."""
