window.MathJax = { tex: { inlineMath: [["\\(", "\\)"]] }, options: { processHtmlClass: "arithmatex|doc" } };
