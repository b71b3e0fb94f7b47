"""What a training loop needs beside model, data and loss: checkpoints, accumulation, validation, the end of a run."""
