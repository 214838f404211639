"""The miniature: the whole pipeline at toy size, with a text teacher, a vision-language base and problems in both."""
