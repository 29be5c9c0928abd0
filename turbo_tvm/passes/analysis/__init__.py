"""What looks at a graph and does not rewrite it: values, biases, heads, disentangled attention."""
