"""CNI without a socket in sight: the shim, and the pure pieces of both its ends."""
