//! A text of several YAML documents, cut into them without parsing.

/// One document of a text, its `---` and any directives included.
#[derive(Clone, Copy, Debug)]
pub struct Document<'a> {
    /// Where in the text it begins.
    pub start: usize,
    /// All of it.
    pub text: &'a [u8],
    /// Without its `---` line's marker, if that is all there is before it; where JSON would begin.
    pub body: &'a [u8],
    /// False if there is nothing but comments.
    pub has_content: bool,
}

impl Document<'_> {
    /// Whether it begins as JSON does, or as a flow mapping of YAML.
    pub fn begins_as_json(&self) -> bool {
        self.body.trim_ascii_start().first() == Some(&b'{')
    }
}

/// Cuts a text at the lines that mark documents, which no document can contain (YAML 1.2, 9.1.2).
#[derive(Clone, Debug)]
pub struct Documents<'a> {
    text: &'a [u8],
    position: usize,
}

impl<'a> Documents<'a> {
    /// The documents of a text, in its order.
    pub fn new(text: &'a [u8]) -> Self {
        Self { text, position: 0 }
    }

    fn document(&self, start: usize, end: usize, body: usize, has_content: bool) -> Document<'a> {
        Document { start, text: &self.text[start..end], body: &self.text[body..end], has_content }
    }
}

impl<'a> Iterator for Documents<'a> {
    type Item = Document<'a>;

    fn next(&mut self) -> Option<Document<'a>> {
        let mut start = self.position;
        let mut marked = false;
        let mut has_content = false;
        let mut body = start;
        let mut at = start;
        while at < self.text.len() {
            let rest = &self.text[at..];
            let end = rest
                .iter()
                .position(|byte| matches!(byte, b'\n' | b'\r'))
                .map_or(self.text.len(), |end| at + end + 1);
            let line = &self.text[at..end];
            let bom = if line.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
            let line = &line[bom..];
            if is_marker(line, b"---") {
                if marked || has_content {
                    self.position = at;
                    return Some(self.document(start, at, body, has_content));
                }
                marked = true;
                body = at + bom + 3;
                has_content = !is_blank(&line[3..]);
                if bom > 0 {
                    start = at + bom;
                }
            } else if is_marker(line, b"...") {
                if marked || has_content {
                    let document = self.document(start, at, body, has_content);
                    self.position = end;
                    return Some(document);
                }
                start = end;
                body = end;
            } else if !has_content && !is_blank(line) && (marked || line.first() != Some(&b'%')) {
                has_content = true;
                if bom > 0 && !marked {
                    start = at + bom;
                    body = start;
                }
            }
            at = end;
        }
        self.position = at;
        (marked || has_content).then(|| self.document(start, at, body, has_content))
    }
}

fn is_marker(line: &[u8], marker: &[u8; 3]) -> bool {
    line.strip_prefix(marker)
        .is_some_and(|rest| matches!(rest.first(), None | Some(b' ' | b'\t' | b'\r' | b'\n')))
}

/// White space and comments alone.
fn is_blank(line: &[u8]) -> bool {
    let line = line.trim_ascii_start();
    matches!(line.first(), None | Some(b'#'))
}
