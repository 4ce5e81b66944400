"""The objective: model, loss and data as one function, and the checks that keep it one."""
