"""The loss card: what a loss does, without a model, in seconds. `scripts/loss_card.py` prints it.

    batches.py    global batches of chosen log-ratios, from the loss's own loader; parts and mirror images of a batch
    subject.py    a loss that can be asked: its outcome and its gradient on a batch
    checks.py     the checks of values and gradients; add a function to add a check
    limits.py     the checks at the limits: small and odd batches, extreme and rounded log-probs
    card.py       all checks of a loss, and the departures that it declares
    sweep.py      loss and gradient of one response against its reward
    picture.py    these curves of one loss or of many as a PNG
    terminal.py   the card as text

Tests run the checks on every file of config/loss/. Nothing else in halos imports these rooms.
"""
