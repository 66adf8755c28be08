"""Code that runs inside SGLang's processes, in place of functions and classes of its own. Imports SGLang."""
