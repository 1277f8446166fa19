"""The one exception that means "the user can put this right": `train_qlora` prints it and exits with 2."""


class UserError(ValueError):
    """A mistake in what the user gave (a path, a name, a number), told in one sentence that says what to do."""
