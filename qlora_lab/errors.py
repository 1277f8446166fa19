"""The exception for what the user can put right: `train_qlora` prints it and exits with 2."""


class UserError(ValueError):
    """A mistake in the user's input (a path, a name, a number). Its message is one sentence that says what to do."""
