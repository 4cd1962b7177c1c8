"""Images with sentences about them, and the tasks that can be made of the two."""
