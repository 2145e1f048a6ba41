"""The machinery under the loss seam: packing, log-probs, models, checkpoints. A new loss never needs a change here."""
