"""The oracle world: small enough to enumerate every response, so the best policy is known exactly."""
