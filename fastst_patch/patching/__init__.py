"""patch(), unpatch(), and what switches them on in a child process or a notebook."""
