//! Requests straight into the router, without a socket.

use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Method, Request, StatusCode};
use dsa80_serve::mock::{self, MockEngine, MockOptions};
use dsa80_serve::{ServedModel, ServerOptions, ServerState, router};
use serde_json::Value as Json;
use tower::ServiceExt;

/// A server with a mock engine.
pub(crate) struct Server {
    pub(crate) engine: Arc<MockEngine>,
    pub(crate) state: ServerState,
}

/// A response with its body.
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Server {
    pub(crate) fn new(mock: MockOptions) -> Self {
        Self::with(
            mock,
            ServerOptions { model_names: vec!["m".into(), "org/m".into()], ..Default::default() },
        )
    }

    /// Recites `text`, byte by byte.
    pub(crate) fn reciting(text: &str) -> Self {
        Self::new(MockOptions { scripts: vec![bytes(text)], ..MockOptions::default() })
    }

    pub(crate) fn with(mock: MockOptions, options: ServerOptions) -> Self {
        let engine = MockEngine::new(mock);
        let model = ServedModel { text: Arc::new(mock::text_model()), engine: engine.handle() };
        Self { state: ServerState::ready_with(options, model), engine }
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Reply {
        let response = router(self.state.clone()).oneshot(request).await.unwrap();
        let (head, body) = response.into_parts();
        let body = to_bytes(body, usize::MAX).await.unwrap();
        Reply { status: head.status, headers: head.headers, body: String::from_utf8(body.to_vec()).unwrap() }
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn post_text(&self, path: &str, body: impl Into<String>) -> Reply {
        self.send(post(path, body.into())).await
    }

    pub(crate) async fn post(&self, path: &str, body: Json) -> Reply {
        self.post_text(path, body.to_string()).await
    }

    /// A chat request about nothing in particular, with `fields` on top.
    pub(crate) async fn chat(&self, fields: Json) -> Reply {
        self.post(
            "/v1/chat/completions",
            over(serde_json::json!({"messages": [{"role": "user", "content": "hi"}]}), fields),
        )
        .await
    }

    pub(crate) async fn complete(&self, fields: Json) -> Reply {
        self.post("/v1/completions", over(serde_json::json!({"prompt": "Hello"}), fields)).await
    }
}

impl Reply {
    pub(crate) fn json(&self) -> Json {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The answer, which must be a success.
    pub(crate) fn ok(&self) -> Json {
        assert_eq!(self.status, StatusCode::OK, "{}", self.body);
        self.json()
    }

    /// The error object, which must have this status.
    pub(crate) fn error(&self, status: u16) -> Json {
        assert_eq!(self.status.as_u16(), status, "{}", self.body);
        let error = self.json()["error"].clone();
        let keys: Vec<&str> = error.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"], "OpenAI's shape");
        error
    }

    /// The data of all events; the last must be `[DONE]`.
    pub(crate) fn events(&self) -> Vec<Json> {
        assert_eq!(self.status, StatusCode::OK, "{}", self.body);
        assert_eq!(self.headers["content-type"], "text/event-stream");
        let data: Vec<&str> =
            self.body.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        let (done, chunks) = data.split_last().unwrap();
        assert_eq!(*done, "[DONE]");
        chunks.iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
    }
}

/// A JSON POST.
pub(crate) fn post(path: &str, body: String) -> Request<Body> {
    Request::builder()
        .method(Method::POST)
        .uri(path)
        .header("content-type", "application/json")
        .body(Body::from(body))
        .unwrap()
}

/// `fields` over `base`.
pub(crate) fn over(mut base: Json, fields: Json) -> Json {
    base.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    base
}

/// A token for each byte.
pub(crate) fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// The answer as text to compare with, its random parts named.
pub(crate) fn stable(mut json: Json) -> String {
    let id = json["id"].as_str().unwrap().to_owned();
    let (prefix, random) = id.split_once('-').unwrap();
    assert_eq!(random.len(), 32);
    json["id"] = format!("{prefix}-ID").into();
    assert!(json["created"].as_u64().unwrap() > 1_700_000_000);
    json["created"] = "NOW".into();
    json.to_string()
}
