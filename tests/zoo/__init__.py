"""Networks of other packages, unchanged and with random weights, each compared with autograd through itself."""
