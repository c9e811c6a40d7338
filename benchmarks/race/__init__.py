"""Every serious loader, side by side, on the same files. How, and why so: METHOD.md beside."""
