"""Does an optimizer keep the conventions of `torch.optim`?"""
