"""What a training run needs beside the step: device, schedule, run folder, metrics, display."""
